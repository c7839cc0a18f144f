"""Look into a network: pages that need nothing but a browser. The plots need matplotlib (`cellstack[torch]`)."""

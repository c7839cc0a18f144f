"""A plugin for pytest that runs tests with the kernel of another module: CELLSTACK_KERNEL=PATH pytest -p trapped …"""

import importlib.util
import os
import sys

if path := os.environ.get("CELLSTACK_KERNEL"):
    specification = importlib.util.spec_from_file_location("cellstack._kernel", path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # before anything imports cellstack
    specification.loader.exec_module(module)

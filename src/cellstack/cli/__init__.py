"""The command line: `main` defines the parser; each verb is a module, or a function in one."""

"""The command line: `main` has the parser, each verb a module or a function in one."""

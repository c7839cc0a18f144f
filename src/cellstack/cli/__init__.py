"""The command line: `main` has the parser, `files` and `stream` the verbs on files and on frames."""

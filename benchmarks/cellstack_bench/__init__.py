"""Speed compared with other installed libraries and with the machine's limits: what `cellstack bench` measures.

`engines` sets up each library with the same weights, `turns` times them in turn, `machine` measures the processor,
`surface` iterates over shapes, `picture` plots, `command` is the verb of the command line.
"""

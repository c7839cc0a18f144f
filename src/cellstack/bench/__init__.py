"""How fast we are, beside whoever else is installed and beside the machine: what `cellstack bench` measures.

`engines` sets each library up with the same weights, `turns` times them in turn, `machine` measures the processor,
`surface` goes over shapes, `picture` draws.
"""

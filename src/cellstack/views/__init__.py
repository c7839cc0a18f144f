"""Views of a cell's step: for each, a class of the operations over which `cellstack.cells` writes the equations."""

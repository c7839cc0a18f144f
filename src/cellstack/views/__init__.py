"""Views of a cell's step: each is a class with the operations of `cellstack.cells.base.Ops`."""

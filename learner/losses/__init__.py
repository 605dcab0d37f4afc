"""The losses and what goes into them: pure functions, each with its paper in its docstring."""

"""What a compiled program costs, found on a machine that could not run it.

`count_operations` reads a function's jaxpr, `collective_bytes` the text of a compiled program, and `compile_report`
compiles for devices that need not be there and says whether the program fits their memory and what holds it back. Each
is about one program; meshes, models and configs are the caller's.
"""

"""What the tests of Triton kernels need: an interpreter that computes as a GPU does, guards against faults it does not
notice, the rule for errors, seeded faults, and compilation for a GPU that is not there.

Importing this package imports neither torch nor triton. The interpreter and the compiler exclude each other in one
process: TRITON_INTERPRET is read when triton is first imported.
"""

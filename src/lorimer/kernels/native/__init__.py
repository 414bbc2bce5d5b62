"""The kernels in C++, for x86 CPUs and in portable form for others.

build.py        compiles them; library.py finds, loads and calls them
vector.hpp      vectors of floats, the same words for each instruction set
parallel.hpp    threads and scratch memory
matmul.cpp      bf16 and fp32 matrix products with weights as they lie
attention.cpp   causal attention over packed rows
head.cpp        the loss head in one sweep
quantised.cpp   numbers of weights in 4 to 8 bits
quantiser.cpp   the other way: numbers into 4 or 8 bits
elementwise.cpp norms, rotation, gated units, AdamW
ops.py          each as a function with the signature of its reference
"""

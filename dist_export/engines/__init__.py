"""Building TensorRT-LLM engines from exports. Only `adapter` imports tensorrt_llm, and only when it is called.

Every target rank is built by a process of its own (`worker`), started fresh: one GPU is visible to it, no launcher's
variables are, and whatever TensorRT-LLM does to MPI or to CUDA ends with it. So builds work alike under torchrun, srun,
mpirun and without a launcher, and the memory of a conversion that ran before is free.
"""

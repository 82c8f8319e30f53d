"""Many processes, one result: how ranks share the work of a step, agree, save, and come together at the end.

alone.py       what a step asks of any strategy, and its answer where there is one process: read this first
group.py       joining the other ranks; what all strategies of more than one rank share
replicated.py  ddp
sharded.py     fsdp2 and tensor_parallel: parameters are DTensors
zero.py        deepspeed_zero2 and deepspeed_zero3
resharding.py  checkpoints of sharded tensors, and from any number of ranks to any other
torchrun.py    starting ranks from a frozen run
"""

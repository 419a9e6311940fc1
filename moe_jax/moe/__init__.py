"""The mixture-of-experts layer.

module.py          the parameters                 layer.py      all steps as pure functions
sharded.py         the layer over many devices    balance.py    balance losses, router bias

route.py           1. gate and weights            rules.py      how experts are chosen
plan.py            2. the rows of each expert
dispatch.py        3. tokens to rows              experts.py    4. SwiGLU of each row
combine.py         5. weighted sum a token

implementation.py  what runs steps 3 to 5: reference.py, xla.py, or Triton (moe_kernels)
precision.py       operands rounded to FP8

expert_parallel.py tokens to experts on other devices: hops.py, slots.py, lanes.py, wire.py
"""

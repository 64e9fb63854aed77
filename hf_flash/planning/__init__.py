"""Planning: how fast a model will decode on this machine, and how much memory it should have, before it is there.

`plan` in `planner.py` is the way in, `plan_mixture` in `mixture.py` what it calls for a mixture of experts, `plan_pair` in
`pairing.py` for two models that share a budget.
"""

"""Calibration: run text through a repacked model, measure what its neurons do, and train predictors on that.

`calibrate` in `job.py` is the way in. This room may import everything from `errors` up to `runtime`; `planning`, `bench`,
`evaluation` and `hub` may import it.
"""

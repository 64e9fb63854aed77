"""Calibration: run text through a repacked model, measure what its neurons do, and train predictors on that.

`calibrate` in `job.py` is the way in.
"""

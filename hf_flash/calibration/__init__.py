"""Calibration: run text through a repacked model, measure what its neurons do, and train predictors on that.

The entry point is `calibrate` in `job.py`.
"""

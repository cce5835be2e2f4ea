"""Post-training quantisation: from a checkpoint and texts to a calibration file that an export takes."""

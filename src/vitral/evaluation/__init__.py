"""How well a model does: metrics, calibration, probes, the doctor."""

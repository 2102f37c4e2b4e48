"""How good answers are: loss and accuracy against memory, calibration, auto."""

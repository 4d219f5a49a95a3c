"""What calibration text shows of every weight and expert, as a file."""

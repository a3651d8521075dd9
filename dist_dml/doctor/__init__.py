"""`dist-dml doctor`: what would stop or slow a training here, and what to do about it."""

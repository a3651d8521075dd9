"""Deep metric learning over very many classes. Start reading at `dist_dml/train.py`."""

__version__ = "0.1.0"

"""What executes the annotations of `dist_dml` in the tests: shapes, dtypes and types."""

from beartype import BeartypeConf, beartype

# An int is a float wherever Python takes it for one (PEP 484).
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

"""`torchrun -m dist_dml.doctor`, `deepspeed --module dist_dml.doctor`, `srun python -m ...`."""

import sys

from dist_dml.doctor.command import main

sys.exit(main())

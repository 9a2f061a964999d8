"""Many models, revisions and data sets in one run, with nothing lost.

| file           | one idea                                                              |
|----------------|-----------------------------------------------------------------------|
| `plan.py`      | what is asked for, checked whole                                       |
| `arguments.py` | what an analysis is given, checked against its signature               |
| `models.py`    | the models: found, named by content, measured without loading          |
| `unit.py`      | one analysis of one model on one data set, and its content-addressed id |
| `worker.py`    | runs a unit on the model it keeps                                      |
| `executors.py` | workers in this process, in others, or in Ray actors                   |
| `results.py`   | a unit's folder: whole, once, with checksums                           |
| `lock.py`      | one driver a folder                                                    |
| `run.py`       | the driver                                                             |
| `collect.py`   | the tables of all units as one                                         |
"""

from interp.batch.collect import export_dataset, reports, tables
from interp.batch.run import lay_out, run_plan

__all__ = ["export_dataset", "lay_out", "reports", "run_plan", "tables"]

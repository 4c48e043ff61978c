"""What jobs do with an engine: functions of a `Trainer`, which leave the engine ready for the next one."""

START, END = "start", "end"  # of the engine: the first and the last step of every job

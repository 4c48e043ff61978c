"""Holds the timeouts of the package, in seconds: what each must exceed stands beside it, and is asserted.

How long a call may take is the user's `timeout_s`. All others follow from how fast a failure is to be reported.
"""

from __future__ import annotations

# ---- noticing a failure ----

# A node that is cut off closes nothing. After IDLE seconds of silence the kernel asks whether the peer is there, every
# INTERVAL seconds, COUNT times (tcp(7)). It answers for a process that is busy or stopped, too.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 4, 2, 3
CUT_OFF_S = KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT
# How long a peer's alarm may take to be written or read.
ALARM_S = 1.0
# How long the report of a scheduler process that ends may take to be written.
LAST_WORDS_S = 2.0
# How long to look whether a rank whose connection was closed has said goodbye, on another way.
GOODBYE_S = 1.0
assert GOODBYE_S >= ALARM_S
# When a peer dies, SGLang's collectives raise at the same time as the watchdog hears of the cause, which is to come
# first. Of a node that is cut off, some ranks hear a probe or two before others.
CAUSE_FIRST_S = 2.0
CAUSE_FIRST_OVER_NODES_S = 8.0
assert CAUSE_FIRST_S >= ALARM_S
assert CAUSE_FIRST_OVER_NODES_S >= KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT + CAUSE_FIRST_S

# ---- saying what caused it ----

# How long a rank waits for one key in torch's store while it reports a failure: the store may be gone.
STORE_S = 5.0
# How long to look for another rank's better explanation, and how often to look for its death during the start.
EXPLANATION_S = 3.0
LOOK_S = 0.5
assert EXPLANATION_S > LAST_WORDS_S
# How long the exit status of a process that closed its channel may take to appear.
EXIT_STATUS_S = 5.0
# A node that is cut off is named on every rank after so long at most: it is noticed, the processes tell each other, the
# trainer looks for a better explanation. The documentation says "about 15 s".
CUT_OFF_NAMED_S = CUT_OFF_S + ALARM_S + EXPLANATION_S + GOODBYE_S
assert CUT_OFF_NAMED_S <= 15.0

# ---- calls ----

# A scheduler process gives up a call after `timeout_s` by itself, with more to say than that it hangs.
REPLY_MARGIN_S = 5.0
assert REPLY_MARGIN_S > LAST_WORDS_S + GOODBYE_S
# How long a process is asked to end before it is killed, and how long the kernel may take to end it then.
STOP_S = 5.0
KILL_S = 30.0
# Longest pause inside a message: it is written as fast as it is read.
MESSAGE_PAUSE_S = 60.0
# How often a leader whose requests run hears that steps are made, at most, and how often it looks.
LONGEST_SILENCE_S = 1.0
LIVENESS_S = 1.0
# While another thread's call reads the channel, how often the event loop looks whether it still does.
NEXT_LOOK_S = 0.01
assert NEXT_LOOK_S < LIVENESS_S
# How long other replicas may take to close what they have mapped of memory that a trainer has freed.
OTHERS_UNMAP_S = 3.0
# Ranks reach an update on GPUs, and finish it, within a few milliseconds: until then they look without going to sleep.
# The trainer looks longer: its process copies meanwhile.
SCHEDULER_SPIN_S = 0.005
TRAINER_SPIN_S = 0.05
assert SCHEDULER_SPIN_S < TRAINER_SPIN_S

# ---- meeting ----

# poll(2) counts milliseconds in 32 bits.
LONGEST_TIMEOUT_S = 2_000_000
# How long to wait for the others with a `timeout_s` that is refused.
REFUSED_TIMEOUT_S = 60.0
# How often a rank looks into torch's store for the others.
MEETING_POLL_S = 0.005
# How long a stranger on a listening port may take to say who it is: the members wait meanwhile.
HELLO_S = 5.0
# The first message to a scheduler process: its trainer sends it at once.
FIRST_MESSAGE_S = 60.0
# How long each step of passing file descriptors may take, and how soon a full kernel is asked again.
DESCRIPTORS_S = 60.0
DESCRIPTORS_RETRY_S = 0.005
assert HELLO_S < DESCRIPTORS_S

# ---- the doctor ----

# How long another node, or another process of this one, may take to answer while the doctor tries the way to it.
DOCTOR_CONNECT_S = 3.0
DOCTOR_DESCRIPTORS_S = 30.0
assert DOCTOR_DESCRIPTORS_S > HELLO_S

# ---- Ray and verl ----

# How often a driver looks at its ranks.
RAY_POLL_S = 1.0
# How long the ranks of a job may take to fail after the first: an engine notices a node that is cut off, and says why.
RAY_GRACE_S = 20.0
assert RAY_GRACE_S > CUT_OFF_NAMED_S
# How long the other ranks may take to say what they think of a failure whose cause is known.
RAY_AFTERMATH_S = 3.0
# How often verl's replica asks whether its engine lives, and how long an abort may take.
VERL_LIVENESS_S = 5.0
VERL_ABORT_S = 60.0

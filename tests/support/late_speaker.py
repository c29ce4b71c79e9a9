"""Planted in training processes: the second one comes to its errors seconds after the first."""

import os
import time

from stvit.train import distributed

if os.environ.get("RANK") == "1":
    first_to_say = distributed.first_to_say

    def late(text: str) -> bool:
        time.sleep(3)
        return first_to_say(text)

    distributed.first_to_say = late

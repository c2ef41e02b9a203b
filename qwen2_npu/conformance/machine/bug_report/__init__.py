"""What a bug report needs, in one archive: machine, versions, the operators' results, answers to open questions.

Reading order: ``catalogue`` (every operator against its golden), ``probes`` and ``questions`` (what only a device can
answer), ``redaction`` (what leaves the machine), ``bundle`` (the archive).
"""

from __future__ import annotations

"""Experiments: batch variance as it shows on this machine, and what each policy costs here.

``associativity``, ``matmul``, ``layers`` and ``flips`` each have ``measure(...)``, which returns a report, and
``render(report, console)``; ``report`` puts them together, ``stablegen.pages.lab`` makes a page of it. ``bench``
measures speed, ``demo`` shows the whole idea in a minute. Beside them stands what they share.
"""

"""Experiments: batch variance as it shows on this machine, and what each policy costs here.

``associativity``, ``matmul``, ``layers`` and ``flips`` each have ``measure(...)``, which returns a report;
``experiments`` runs all four. ``bench`` measures speed, ``demo`` shows the whole idea in a minute. ``reports`` holds
what they return: ``stablegen.console.lab`` prints it, ``stablegen.pages.lab`` writes it as a page.
"""

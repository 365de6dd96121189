"""`widemargin plan`: memory, time and scaling of a run, before anything runs.

``command.py`` reads arguments; ``shapes.py``, ``engines.py`` and ``lengths.py`` say what would run;
``simulation.py`` runs one micro-batch on tensors without data and watches what would be held;
``memory.py``, ``speed.py`` and ``advice.py`` make numbers of it, ``text.py`` a page.
"""

"""The flow-map family: one regression of the average velocity, and what its methods put into it.

=====================  ===========  ==============  =============  ==================
method                 rule         velocity        tangent        weight
=====================  ===========  ==============  =============  ==================
MeanFlow               Eulerian     data, teacher   the same       any
improved MeanFlow      Eulerian     data, teacher   student's own  any
Modular MeanFlow       Modulated    data, teacher   the same       any
Align Your Flow, EMD   Eulerian     teacher         the same       normalised
alpha-Flow, SoFlow     Discrete     data, teacher   -              any, times alpha
SplitMeanFlow          Split        data, teacher   -              any
shortcut               Split, half  data, teacher   -              any
Terminal Velocity      Lagrangian   data, teacher   end of jump    any
Align Your Flow, LMD   Lagrangian   teacher         end of jump    normalised
=====================  ===========  ==============  =============  ==================

``objective`` is the regression, ``rules`` are its targets, ``velocity``, ``guidance``, ``weights`` and ``schedules``
the other ingredients; ``methods`` puts them together from a config. ``free_flow`` and ``trajectory`` need no data and
are regressions of their own.
"""

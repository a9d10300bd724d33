"""The consistency family: a jump to the end of its segment says the same from ``t`` as from one step nearer to data.

======================  ==========================  ===============  ====================  =============================
method                  steps                       ends             from                  distance, divided by
======================  ==========================  ===============  ====================  =============================
consistency (CD, CT)    nodes of a grid             data             teacher, data         square, step
improved consistency    nodes, drawn log-normally   data             data, teacher         pseudo-Huber, noise step
easy consistency        a share of the noise level  data             data, teacher         pseudo-Huber, noise step
truncated consistency   the same, from noise >= 1   data             data, teacher         pseudo-Huber, noise step
phased consistency      nodes of a grid             segment ends     teacher, data         Huber per coordinate
consistency-FM          a constant                  segment ends     data, teacher         square, velocities too
continuous consistency  none: a derivative          data             data, teacher         square, learned variance
self-corrected          random, both ways           data             teacher               Huber per coordinate
======================  ==========================  ===============  ====================  =============================

``objective`` is the discrete form and ``continuous`` its limit; ``steps`` says which times are compared, ``schedules``
how that changes over a training, ``measures`` what a deviation costs; ``methods`` puts them together from a config.
``self_corrected`` compares more than two points and is an objective of its own.
"""

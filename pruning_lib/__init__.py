"""Structured pruning: AMP for language models, Consensus for residual networks.

Letters used for shapes, everywhere in the code and in the book:

======  =======================================
``B``   batch
``T``   tokens
``C``   width of the residual stream
``H``   query heads of one block
``G``   key/value groups of one block
``D``   width of one head
``M``   MLP neurons of one block
``L``   blocks
``N``   samples
``P``   features
======  =======================================

A method scores the parts of a model (``amp.importance``), a rule turns scores into a plan
(``amp.choose``), and only ``surgery.remove`` cuts.  Importing the package prints and draws nothing.
"""

__version__ = "0.1.0"

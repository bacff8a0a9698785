"""The independent truth of the tests: slow float64 code written from the published equations.

Nothing here imports ``stm``; a test compares the two. ``scan_reference`` and ``vim_reference``
are numpy only, ``weights`` fills a torch module with values like a trained model's.
"""

"""Looking inside a HAG-MoE: what did each expert learn? `hagmoe analyze` makes a page of it.

texts    what to look at: read files, with domain and language where known
trace    run texts, record routing on disk           probes   what routing alone does not show: gates, outputs, masking
stats    every formula, NumPy only                   summary  from a trace to all numbers, and to findings in words
plots    how each kind of picture is drawn           pictures what is drawn of a trace, section by section
page     the page that shows it                      report   the whole way
"""

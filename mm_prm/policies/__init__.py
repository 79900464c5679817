"""Who writes solutions: policies that answer the requests of annotation."""

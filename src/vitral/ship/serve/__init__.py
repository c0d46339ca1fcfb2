"""A model behind HTTP: one process, one thread that computes, a bounded line of those who wait.

`server` begins and ends it, `app` is its routes, `pipeline` takes pictures from bytes to answers by way of
`batching`, `admission` says who may wait, `exchange` reads requests and writes answers.
"""

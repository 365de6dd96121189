"""`widemargin evaluate`: a trained model on preference pairs and on the published benchmarks.

Official numbers come from the benchmarks' tools and judges. This room answers their questions,
writes the files that they read, and calls them; without a judge it measures preference pairs.

A companion: it may import the core, which never imports it. Start in `evaluate_command`; then
`pairs` or `benchmarks`.
"""

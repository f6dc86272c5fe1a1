"""apex as far as we call it, for tests: signatures as in Ascend's apex, bodies our own and plain.

It trains, on any device and without kernels, so that the flow around it can be tested: what amp is called
with and when, never its speed. tests/precision/test_apex.py removes `combine_grad` to have NVIDIA's last amp.
"""

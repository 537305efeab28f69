"""Tests of ``mirror/cli/doctor/``."""

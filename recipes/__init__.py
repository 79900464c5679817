"""Settings and programs that made the shipped models, and others to start from. Installed as `mm_prm.recipes`."""

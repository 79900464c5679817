"""Templates of the cards that go to the Hub with models, datasets and metrics. Installed as `mm_prm.hub_cards`."""

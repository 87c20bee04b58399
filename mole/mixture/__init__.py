"""The adapter: routers, experts and the layers that combine them, as a PEFT tuner."""

"""The certificate that a layout changes nothing: one tiny model, trained under every layout and in one process."""

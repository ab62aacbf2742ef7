"""The training loop, alone or shared by several processes."""

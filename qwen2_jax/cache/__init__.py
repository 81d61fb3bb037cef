"""The paged key/value cache: arrays on the device and their bookkeeping on the host. Importing it loads nothing."""

"""What people type to train, evaluate and look at data: options in, calls to the modules beside, tables out."""

"""`sd-memguard check`: what is wrong with a folder of captioned images, for users of any trainer."""

"""Everyday words that serve as new names of concepts, without directions and numbers."""

_WORDS = """
ant badger bat bear beaver bee beetle bison camel cat cheetah chicken cobra cow crab crane crow
deer dog dolphin donkey dove duck eagle eel falcon ferret finch fox frog gecko goat goose
hamster hare hawk hedgehog heron horse hyena jackal jaguar koala lemur leopard lion lizard llama
lobster lynx magpie mole moose moth mouse mule newt octopus otter owl ox panda panther parrot
pelican penguin pigeon pony puma quail rabbit raccoon raven salmon seal shark sheep shrimp skunk
sloth snail snake sparrow spider squid stork swan tiger toad trout turkey turtle walrus wasp
whale wolf wombat zebra
amber azure beige black blue bronze brown coral crimson cyan gold gray green indigo ivory khaki
lilac magenta maroon mauve navy olive orange pink plum purple red ruby rust scarlet silver teal
turquoise violet white yellow
almond apple apricot bacon bagel banana basil bean beet berry bread butter cabbage cake carrot
cheese cherry chili cocoa coffee cookie corn cream cumin curry date egg fig flour garlic ginger
grape honey jam juice kale lemon lentil lime mango melon milk mint mustard noodle nutmeg oat
onion papaya pasta peach pear pepper pickle pizza potato pumpkin radish raisin rice salad salt
sauce soup spinach sugar tea toast tofu tomato vanilla walnut yogurt
"""

EVERYDAY_WORDS = tuple(_WORDS.split())
"""Names of animals, then colours, then food."""

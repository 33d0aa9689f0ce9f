"""Tables of facts for `data/questions.py`: "left: right" rows, or names in their order."""

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
SIZES = "an ant, a bee, a mouse, a rabbit, a fox, a sheep, a cow, an elephant, a house, a mountain"

CAPITALS = """France: Paris, Spain: Madrid, Italy: Rome, Germany: Berlin, Portugal: Lisbon,
Greece: Athens, Poland: Warsaw, Austria: Vienna, Hungary: Budapest, Norway: Oslo,
Sweden: Stockholm, Finland: Helsinki, Denmark: Copenhagen, Iceland: Reykjavik, Ireland: Dublin,
Belgium: Brussels, Romania: Bucharest, Bulgaria: Sofia, Turkey: Ankara, Egypt: Cairo,
Kenya: Nairobi, Nigeria: Abuja, Ghana: Accra, Morocco: Rabat, Ethiopia: Addis Ababa,
Senegal: Dakar, Uganda: Kampala, Algeria: Algiers, Angola: Luanda, Zambia: Lusaka,
Zimbabwe: Harare, Canada: Ottawa, Mexico: Mexico City, Cuba: Havana, Jamaica: Kingston,
Brazil: Brasilia, Argentina: Buenos Aires, Chile: Santiago, Peru: Lima, Colombia: Bogota,
Ecuador: Quito, Uruguay: Montevideo, Venezuela: Caracas, Japan: Tokyo, China: Beijing,
South Korea: Seoul, India: New Delhi, Pakistan: Islamabad, Nepal: Kathmandu,
Bangladesh: Dhaka, Thailand: Bangkok, Vietnam: Hanoi, Malaysia: Kuala Lumpur,
the Philippines: Manila, Iran: Tehran, Iraq: Baghdad, Jordan: Amman, Lebanon: Beirut,
Syria: Damascus, Saudi Arabia: Riyadh, Qatar: Doha, Oman: Muscat, Australia: Canberra,
New Zealand: Wellington, Fiji: Suva, Russia: Moscow, Armenia: Yerevan, Cyprus: Nicosia,
Malta: Valletta, Croatia: Zagreb, Serbia: Belgrade, Slovakia: Bratislava, Estonia: Tallinn,
Latvia: Riga, Lithuania: Vilnius, Albania: Tirana, Afghanistan: Kabul, Sudan: Khartoum,
Libya: Tripoli, Rwanda: Kigali, Mali: Bamako, Ukraine: Kyiv"""

COLORS = """the sky: blue, grass: green, snow: white, coal: black, a banana: yellow, blood: red,
a lemon: yellow, a tomato: red, a carrot: orange, milk: white, chocolate: brown, a pea: green,
a strawberry: red, a raven: black, a polar bear: white, a flamingo: pink, an elephant: gray,
lavender: purple, a blueberry: blue, a frog: green, a fire engine: red, a pumpkin: orange,
salt: white, a ruby: red, an emerald: green, a sapphire: blue, a daffodil: yellow, tar: black,
cotton: white, a canary: yellow, ketchup: red, a pig: pink, an aubergine: purple, a swan: white,
a cucumber: green, ash: gray, tree bark: brown, soil: brown, an amethyst: purple, butter: yellow,
a cherry: red, rice: white, a tangerine: orange, a chestnut: brown, a dolphin: gray, jade: green,
the sea: blue, candy floss: pink, liquorice: black, a violet: purple"""
MIXTURES = """red and yellow: orange, blue and yellow: green, red and blue: purple,
black and white: gray, red and white: pink, red and green: brown"""

OPPOSITES = """hot: cold, big: small, up: down, day: night, black: white, fast: slow, high: low,
open: shut, heavy: light, dark: bright, happy: sad, rich: poor, wet: dry, full: empty,
old: young, hard: soft, loud: quiet, early: late, long: short, thick: thin, wide: narrow,
clean: dirty, strong: weak, true: false, love: hate, win: lose, buy: sell, give: take,
push: pull, start: stop, beginning: end, in: out, on: off, above: below, before: after,
first: last, deep: shallow, near: far, sweet: sour, smooth: rough, sharp: blunt,
safe: dangerous, cheap: expensive, easy: difficult, good: bad, inside: outside, top: bottom,
front: back, north: south, east: west, summer: winter, war: peace, friend: enemy, laugh: cry,
remember: forget, arrive: leave, question: answer, float: sink, freeze: melt, asleep: awake,
always: never, everything: nothing, yes: no, alive: dead, brave: cowardly, polite: rude,
lucky: unlucky, possible: impossible, success: failure, male: female, increase: decrease,
accept: refuse, tight: loose, raw: cooked, odd: even, maximum: minimum, entrance: exit,
import: export, victory: defeat, hero: villain, ancient: modern, guilty: innocent,
lend: borrow, attack: defend, build: destroy, show: hide, sunrise: sunset, wild: tame"""

YOUNG = """cat: kitten, dog: puppy, sheep: lamb, horse: foal, pig: piglet, goat: kid,
hen: chick, duck: duckling, goose: gosling, swan: cygnet, deer: fawn, frog: tadpole, owl: owlet,
eagle: eaglet, butterfly: caterpillar, hare: leveret, seal: pup, kangaroo: joey, cow: calf,
lion: cub"""
MANY_PARENTS = ("kid", "pup", "joey", "calf", "cub", "foal")  # young of more than one animal
MORE_YOUNG = """elephant: calf, whale: calf, bear: cub, tiger: cub, leopard: cub, koala: joey,
giraffe: calf, dolphin: calf, zebra: foal, donkey: foal, panda: cub"""

SOUNDS = """a cow: moo, a dog: woof, a cat: meow, a sheep: baa, a duck: quack, a pig: oink,
a horse: neigh, a lion: roar, a bee: buzz, a snake: hiss, an owl: hoot, a frog: croak,
a small bird: tweet, a donkey: hee-haw, a mouse: squeak, a rooster: cock-a-doodle-doo,
a wolf: howl, a crow: caw, a turkey: gobble, a clock: tick tock, a bell: ding dong"""
HOMES = """a bee: a hive, a bird: a nest, a spider: a web, a dog: a kennel, a horse: a stable,
a rabbit: a burrow, a pig: a sty, a lion: a den, a king: a palace, a hen: a coop, a cow: a barn,
a goldfish: a bowl, a monk: a monastery, a prisoner: a cell, a nun: a convent, a bat: a cave"""

PLURALS = """mouse: mice, child: children, foot: feet, tooth: teeth, goose: geese, man: men,
woman: women, person: people, ox: oxen, leaf: leaves, knife: knives, wife: wives, life: lives,
wolf: wolves, half: halves, loaf: loaves, shelf: shelves, calf: calves, thief: thieves,
potato: potatoes, tomato: tomatoes, hero: heroes, city: cities, baby: babies, lady: ladies,
story: stories, party: parties, country: countries, box: boxes, fox: foxes, bus: buses,
glass: glasses, dish: dishes, watch: watches, church: churches, brush: brushes, house: houses,
book: books, tree: trees, apple: apples, key: keys, toy: toys, window: windows, sheep: sheep,
deer: deer, family: families, berry: berries, kiss: kisses, peach: peaches, elf: elves"""
PASTS = """go: went, see: saw, eat: ate, run: ran, come: came, take: took, give: gave,
write: wrote, drive: drove, sing: sang, drink: drank, swim: swam, begin: began, fly: flew,
know: knew, grow: grew, throw: threw, draw: drew, blow: blew, buy: bought, bring: brought,
think: thought, catch: caught, teach: taught, fight: fought, find: found, hold: held,
tell: told, sell: sold, say: said, make: made, have: had, do: did, sleep: slept, keep: kept,
feel: felt, leave: left, meet: met, send: sent, spend: spent, lose: lost, sit: sat,
stand: stood, understand: understood, speak: spoke, break: broke, choose: chose, steal: stole,
wear: wore, forget: forgot, hear: heard, build: built, pay: paid, ride: rode, shake: shook,
fall: fell, hide: hid, bite: bit, walk: walked, play: played, jump: jumped, open: opened"""
DEGREES = """big: bigger: biggest, good: better: best, bad: worse: worst, fast: faster: fastest,
happy: happier: happiest, tall: taller: tallest, strong: stronger: strongest,
early: earlier: earliest, cold: colder: coldest, hot: hotter: hottest, easy: easier: easiest,
young: younger: youngest, loud: louder: loudest, funny: funnier: funniest,
clean: cleaner: cleanest, heavy: heavier: heaviest, sweet: sweeter: sweetest,
high: higher: highest, kind: kinder: kindest, busy: busier: busiest"""

AMOUNTS = """legs does a dog have: 4, legs does a spider have: 8, legs does an ant have: 6,
legs does a bird have: 2, wheels does a bicycle have: 2, wheels does a tricycle have: 3,
wheels does a car have: 4, sides does a triangle have: 3, sides does a square have: 4,
sides does a pentagon have: 5, sides does a hexagon have: 6, sides does an octagon have: 8,
faces does a cube have: 6, horns does a unicorn have: 1, humps does a dromedary have: 1,
days are in a week: 7, months are in a year: 12, hours are in a day: 24,
minutes are in an hour: 60, seconds are in a minute: 60, weeks are in a year: 52,
minutes are in half an hour: 30, hours are in half a day: 12, seasons are in a year: 4,
fingers are on one hand: 5, toes do two feet have: 10, letters are in the alphabet: 26,
players are in a football team: 11, planets go round the sun: 8, arms does an octopus have: 8,
colors are in a rainbow: 7, cents are in a dollar: 100, years are in a century: 100,
years are in a decade: 10, eggs are in a dozen: 12, strings does a violin have: 4,
keys does a piano have: 88, squares are on a chess board: 64, cards of one suit are there: 13,
days are in January: 31, days are in April: 30, days are in June: 30, days are in August: 31,
days are in September: 30, days are in October: 31, days are in November: 30"""

JOBS = """flies a plane: a pilot, bakes bread: a baker, puts out fires: a firefighter,
cuts hair: a hairdresser, looks after teeth: a dentist, grows crops: a farmer,
delivers letters: a postman, treats sick animals: a vet, writes novels: a novelist,
paints pictures: a painter, takes photographs: a photographer, acts in films: an actor,
drives a taxi: a taxi driver, mends pipes: a plumber, makes suits: a tailor,
sells meat: a butcher, sells flowers: a florist, designs buildings: an architect,
travels into space: an astronaut, catches criminals: a police officer,
decides in a court: a judge, plays the piano: a pianist, plays the drums: a drummer,
lends out books: a librarian, cooks in a restaurant: a chef, serves food at table: a waiter,
commands a ship: a captain, works under ground: a miner, plays the guitar: a guitarist,
teaches a class: a teacher, digs for dinosaur bones: a palaeontologist, keeps sheep: a shepherd"""
TOOLS = """cut paper: scissors, dig a hole: a spade, eat soup: a spoon, slice bread: a knife,
sweep the floor: a broom, open a lock: a key, look at the stars: a telescope,
drive in a nail: a hammer, dry your hands: a towel, clean your teeth: a toothbrush,
tidy your hair: a comb, take a temperature: a thermometer, stay dry in the rain: an umbrella,
reach the roof: a ladder, take a picture: a camera, sew on a button: a needle,
draw a straight line: a ruler, find north: a compass, see tiny things: a microscope,
cut down a tree: an axe, catch a fish: a rod, boil water: a kettle, carry your books: a bag,
dial a number: a telephone, send a letter: a stamp, rub out a mistake: an eraser,
see your own face: a mirror, wake up in time: an alarm clock, light a dark path: a torch"""
BODY = """see: your eyes, hear: your ears, smell: your nose, taste: your tongue,
think: your brain, chew: your teeth, breathe: your lungs, kick: your feet, write: your hand"""
KINDS = {
    "flower": "a rose, a tulip, a daisy, a poppy",
    "tree": "an oak, a pine, a willow",
    "fish": "a salmon, a trout, a shark",
    "bird": "a robin, a penguin, a parrot",
    "insect": "a beetle, a wasp, a grasshopper",
    "snake": "a cobra, a python, a viper",
    "musical instrument": "a violin, a trumpet, a flute",
    "tool": "a hammer, a saw, a chisel",
    "fruit": "an apple, a pear, a banana",
    "vegetable": "a cabbage, an onion, a leek",
    "precious stone": "a diamond, a ruby, an emerald",
    "piece of furniture": "a sofa, a wardrobe, an armchair",
    "kind of dog": "a poodle, a terrier, a labrador",
    "sport": "tennis, hockey, rugby",
    "boat": "a yacht, a canoe, a ferry",
    "dance": "the waltz, the tango, the polka",
    "metal": "copper, iron, zinc",
    "gas": "oxygen, helium, nitrogen",
    "planet": "Mars, Venus, Jupiter",
}
CONTINENTS = {
    "Europe": "France, Spain, Italy, Germany, Greece, Poland, Norway, Sweden, Ireland, Belgium",
    "Africa": "Kenya, Nigeria, Ghana, Morocco, Ethiopia, Senegal, Uganda, Angola, Zambia, Mali",
    "Asia": "Japan, China, India, Nepal, Thailand, Vietnam, Malaysia, Iraq, Jordan, Pakistan",
    "North America": "Canada, Mexico, Cuba, Jamaica",
    "South America": "Brazil, Argentina, Chile, Peru, Colombia, Ecuador, Uruguay, Venezuela",
}
